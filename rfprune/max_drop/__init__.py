"""`--max-drop`: find the smallest model whose score drops by at most a given number of points."""
