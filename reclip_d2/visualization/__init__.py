"""Pictures and pages of predictions, scores and biases."""
