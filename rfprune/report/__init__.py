"""What a run measured, for people and for programs."""
