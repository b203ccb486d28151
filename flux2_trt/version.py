"""The version of this package."""


def own_version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and seldom needed

    try:
        return version("flux2-trt")
    except PackageNotFoundError:
        return "0+uninstalled"
