"""What several adapters share: class scores to accuracies, and logistic regression."""
