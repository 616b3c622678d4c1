"""mmpack inside other training frameworks, one module per framework; each imports its framework only when it is
used."""
