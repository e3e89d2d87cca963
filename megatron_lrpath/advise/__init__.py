"""Predict the loss of branches from the losses logged so far, to choose alpha and the decay."""
