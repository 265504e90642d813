"""Benchmarks of a model: python -m benchmarks.NAME."""


def data_files(folder, suffixes):
    """The files below a folder that end in one of some suffixes, sorted; no hidden ones, such
    as .DS_Store or ._x.jpg, and none in hidden folders."""
    files = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.suffix.lower() in suffixes and path.is_file():
            files.append(path)
    return files
