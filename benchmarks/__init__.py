"""What the ranking step costs, beside other ways to compute it. See docs/performance.md."""
