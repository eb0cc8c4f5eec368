"""Image folders, video clips and demo data."""
