"""Charts: described once, then drawn with plotly or matplotlib, or written as a table."""
