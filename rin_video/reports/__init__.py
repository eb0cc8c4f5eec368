"""Reports on a run: the diagnosis, the HTML page and the model card."""
