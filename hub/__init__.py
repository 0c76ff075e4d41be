"""The package as a kernel of the Hugging Face hub."""
