"""Short programs of minutes on two cores; each writes a picture and a table of its numbers."""
