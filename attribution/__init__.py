"""Which people prefer which telling, by how much, and how sure. An engine: it knows the ground floor only."""
