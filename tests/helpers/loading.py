"""Counts how often discovery networks are read from disk."""

from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel


def counted_loads(monkeypatch) -> list[str]:
    """A list to which the source of every discovery network is appended when it is loaded in this process."""
    loads, real = [], StructureDiscoveryModel.from_pretrained.__func__

    def counted(cls, source, **options):
        loads.append(str(source))
        return real(cls, source, **options)

    monkeypatch.setattr(StructureDiscoveryModel, "from_pretrained", classmethod(counted))
    return loads
