"""Building blocks of the decoder, written as for one device."""
