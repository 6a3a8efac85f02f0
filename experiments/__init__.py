"""Claims about jaxvq, one file each, that anyone can run: see README.md beside this file."""
