"""Devices and the links that join them: an island behind one switch, nodes, a rack, all racks.

Devices are numbered so that neighbours are close: the first ones share an island, islands share a
node, and so on. A group of devices that works together is as fast as the slowest link that it
spans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ch15_helpers.disagg.link import LINKS, LinkModel
from ch15_helpers.errors import PlacementError


@dataclass(frozen=True)
class Level:
    """A set of devices and the link between any two of them.

    Attributes:
        name: ``node``, ``rack`` …
        num_devices: that it joins, those of the levels below included.
        link: what each device has towards its peers, one direction.
    """

    name: str
    num_devices: int
    link: LinkModel


@dataclass(frozen=True)
class Topology:
    """Nested levels, the innermost first. All devices are alike.

    Raises:
        PlacementError: no level, or a level that does not consist of whole levels below it.
    """

    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        if not self.levels or self.levels[0].num_devices < 1:
            raise PlacementError("a topology needs a level with at least one device")
        for inner, outer in zip(self.levels, self.levels[1:], strict=False):
            if outer.num_devices <= inner.num_devices or outer.num_devices % inner.num_devices:
                raise PlacementError(
                    f"level {outer.name!r} of {outer.num_devices} devices must hold several whole "
                    f"levels {inner.name!r} of {inner.num_devices}"
                )

    @property
    def num_devices(self) -> int:
        """All devices."""
        return self.levels[-1].num_devices

    @property
    def node(self) -> Level:
        """The innermost level."""
        return self.levels[0]

    def level_for(self, span: int) -> Level:
        """The innermost level that holds ``span`` neighbouring devices, whichever group they are.

        Groups are laid side by side, so a span that does not divide a level may straddle two.

        Raises:
            PlacementError: there are fewer devices.
        """
        for level in self.levels:
            if span <= level.num_devices and level.num_devices % span == 0:
                return level
        if span <= self.num_devices:
            return self.levels[-1]
        raise PlacementError(f"{span} devices were asked for, the topology has {self.num_devices}")

    def with_bandwidth(self, level: str, bandwidth_GBps: float) -> Topology:
        """The same with another bandwidth at one level.

        Raises:
            PlacementError: there is no level of that name.
        """
        if level not in {each.name for each in self.levels}:
            names = ", ".join(each.name for each in self.levels)
            raise PlacementError(f"no level {level!r}; there are {names}")
        return Topology(
            tuple(
                replace(each, link=replace(each.link, bandwidth_GBps=bandwidth_GBps))
                if each.name == level
                else each
                for each in self.levels
            )
        )


def gpu_cluster(num_nodes: int, nodes_per_rack: int = 4, devices_per_node: int = 8) -> Topology:
    """Nodes with NVLink inside, 400 Gb/s for each device in a rack, 100 Gb/s across racks.

    A starting point with the nominal links of ``disagg.link``; its results are *modelled*.

    Raises:
        PlacementError: racks that would not be full.
    """
    levels = [Level("node", devices_per_node, LINKS["nvlink4"])]
    in_rack = min(num_nodes, nodes_per_rack)
    if num_nodes < 1 or num_nodes % in_rack:
        raise PlacementError(f"{num_nodes} nodes do not fill racks of {nodes_per_rack}")
    if in_rack > 1:
        levels.append(Level("rack", in_rack * devices_per_node, LINKS["400g"]))
    if num_nodes > in_rack:
        levels.append(Level("cluster", num_nodes * devices_per_node, LINKS["100g"]))
    return Topology(tuple(levels))
