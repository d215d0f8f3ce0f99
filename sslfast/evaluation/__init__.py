"""What features are worth: k-nearest neighbours, linear probes and pictures."""
