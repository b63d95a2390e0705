"""Parts that the tabs share: sessions, jobs, files and pictures."""
