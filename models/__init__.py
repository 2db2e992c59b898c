"""The CTR network and the models it is measured against."""
