"""Choice of the experts to remove: rules, expert lists, compression traces."""
