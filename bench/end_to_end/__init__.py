"""Training steps of whole models, with their own loss and with ours."""
