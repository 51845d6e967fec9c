"""Where all bytes come from and go to."""
