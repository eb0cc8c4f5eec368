"""What is said about a run: the diagnosis, the HTML page, the model card."""
