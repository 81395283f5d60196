"""How a client gets into a tier: by the addresses it was given, or by what `samovar up` recorded.

    address set    ──> each in turn, as the host that this machine is
    nothing set    ──> <state_folder>/<name>: the nodes of the tier on this machine, each in turn,
                       as the host that the node is on, so that its arena is mapped

The first node that answers is the client's own from then on. Does not cover: what a client does
once it is in (``kvstore.cluster_routes``).
"""

from dataclasses import dataclass, replace

from kvstore.clock import Clock
from kvstore.cluster_routes import ClusterRoutes
from kvstore.config import ClientConfig, name_flag
from kvstore.errors import UnavailableError, UsageError
from kvstore.machine import host_id as machine_host_id
from kvstore.secret import read_secret
from kvstore.state import TierFolder


@dataclass(frozen=True, slots=True)
class Entry:
    """A node to try, the host identity to come with, and the tier expected there, if any."""

    address: str
    host_id: str
    tier_id: str = ""


def enter(config: ClientConfig, clock: Clock) -> ClusterRoutes:
    """Connect to the first entry that answers.

    Raises ``UsageError`` where there is none to try, ``UnavailableError`` where none answers.
    """
    token = read_secret(config.token_file)
    faults = []
    for entry in entries(config):
        try:
            routes = ClusterRoutes.open(
                entry.address, entry.host_id, token, clock, config.call_deadline_s
            )
        except UnavailableError as fault:
            faults.append(str(fault))
            continue
        # A record outlives its tier, and others may have come to its ports.
        if not entry.tier_id or routes.map.tier_id in ("", entry.tier_id):
            return routes
        routes.close()
        faults.append(f"at {entry.address} is another tier by now")
    hint = "" if config.address else f" (tier {config.name}: see `samovar status`)"
    raise UnavailableError("; ".join(faults) + hint)


def entries(config: ClientConfig) -> list[Entry]:
    """What to try, in this order; never empty."""
    if config.address:
        host_id = config.host_id or machine_host_id()
        return [Entry(address, host_id) for address in config.address]
    nodes = _local(config)
    # A worker that says which host it is on belongs to the node of that host.
    nodes.sort(key=lambda entry: entry.host_id != config.host_id)
    return [replace(node, host_id=config.host_id or node.host_id) for node in nodes]


def _local(config: ClientConfig) -> list[Entry]:
    """The nodes of the tier on this machine."""
    advice = (
        f"start it with `samovar up{name_flag(config.name)}`, or set SAMOVAR_ADDRESS to the "
        "host:port of a storage node"
    )
    if config.state_folder is None:
        raise UsageError(f"no address, and no state folder to look for a tier in: {advice}")
    folder = TierFolder.of(config.state_folder, config.name)
    if folder.read() is None:
        raise UsageError(f"no tier called {config.name} runs on this machine: {advice}")
    cluster_map = folder.read_map()
    if not cluster_map.nodes:
        raise UsageError(f"tier {config.name} has no node yet: {advice}")
    return [Entry(node.control, node.host_id, cluster_map.tier_id) for node in cluster_map.nodes]
