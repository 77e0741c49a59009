"""From collected results to what a person looks at. Needs pandas; figures need matplotlib."""
