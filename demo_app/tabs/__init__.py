"""One file a tab: components, and the events between them."""
