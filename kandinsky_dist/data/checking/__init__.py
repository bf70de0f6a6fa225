"""`data check`: a corpus in figures, tables and a picture."""
