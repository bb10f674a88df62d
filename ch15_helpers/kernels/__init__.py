"""One operation per file: a portable version, and a Triton one where it pays."""
