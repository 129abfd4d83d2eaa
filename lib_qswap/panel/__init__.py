"""What the page shows, for any host."""
