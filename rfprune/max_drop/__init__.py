"""The smallest model within a drop of the score."""
