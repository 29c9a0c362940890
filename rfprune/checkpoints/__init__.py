"""From a name to a loaded model: hub ids, folders, aliases and sentence-transformers."""
