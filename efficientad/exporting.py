"""Floor 4, imports exporting: where the package's lazy imports look for `export`."""

from efficientad.exporting import export as export
