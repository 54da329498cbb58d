"""Section 4 made executable: the bounds, a transformer set by hand that meets the upper one, and a look inside."""
