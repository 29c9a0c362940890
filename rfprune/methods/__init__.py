"""How units are chosen, a method a file."""
