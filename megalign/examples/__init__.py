"""Example configurations, one for each loss; configs/ in the repository links to them."""
