"""One class for each kind of attention inside a layer."""
