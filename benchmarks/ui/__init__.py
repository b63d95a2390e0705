"""Response times of the web page in a browser."""
