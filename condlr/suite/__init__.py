"""The suite: runs and studies."""
