"""Speed: contests with peers, and with what this project was."""
