"""Kaleidoscope: personalised UI. Importing the package imports nothing else; the rooms are its modules."""
