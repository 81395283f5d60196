"""What must hold: at every moment of a run, and once trouble has ended and time has passed.

``check_node`` looks at one living node at any moment: memory adds up, whatever is visible is whole
and right. ``unsettled`` says what is still on its way to the state that everything must reach.
Nothing here asks the code under test whether it is content with itself, but for where it keeps
things.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from kvstore.announce import WAITING_CHANGES_MAX
from kvstore.block import HEADER_BYTES
from kvstore.changes import as_words
from kvstore.placement import homes_of
from kvstore.table import SlotState
from tests.sim.disk_promises import check_disk, disk_pending, readable_on_disk
from tests.sim.prompts import BLOCK_TOKENS, GRID, Prompt
from tests.sim.storage import StorageNode
from tests.sim.vows import lives_of, names_of

Name = tuple[bytes, int]
Right = Mapping[Name, bytes]
"""The right payload of every cell that any client can write."""


def right_payloads(prompts: Iterable[Prompt]) -> dict[Name, bytes]:
    """All cells of all prompts, tails too."""
    found = {}
    for prompt in prompts:
        for key, start, stop in prompt.blocks:
            for cell in GRID.cells:
                part = prompt.kv[
                    cell.layers.start : cell.layers.stop,
                    cell.heads.start : cell.heads.stop,
                    start:stop,
                ]
                found[key, cell.index] = part.tobytes()
    return found


def check_node(node: StorageNode, right: Right, flipped: set[tuple[str, int]]) -> list[str]:
    """What is broken in a node just now."""
    faults = [*_memory(node), *_visible(node, right, flipped)]
    return [f"{node.process.name}: {fault}" for fault in [*faults, *check_disk(node, right)]]


def _memory(node: StorageNode) -> list[str]:
    """Every byte below the frontier is free, held, resting, being written, or retired."""
    tier = node.node.tier
    records = tier.table.slots
    used = records[records["state"] != SlotState.UNUSED]
    total = int(used["size_bytes"].sum()) + tier._space.free_bytes + tier.stats.retired_bytes
    frontier = int(tier.table.header["frontier"])
    faults = []
    if total != frontier:
        by_state = Counter(used["state"].tolist())
        faults.append(f"{total} bytes are accounted for, {frontier} are there: {dict(by_state)}")
    used = used[np.argsort(used["offset"])]
    ends = used["offset"] + used["size_bytes"]
    if (ends[:-1] > used["offset"][1:]).any():
        faults.append("two slots share memory")
    held = records[records["state"] == SlotState.COMMITTED]
    if (len(held), int(held["size_bytes"].sum())) != (tier.stats.held_cells, tier.stats.held_bytes):
        faults.append("the counters of what is held are wrong")
    return faults


def _visible(node: StorageNode, right: Right, flipped: set[tuple[str, int]]) -> list[str]:
    """Every visible cell has the right bytes under the right name."""
    tier = node.node.tier
    faults = []
    for slot in tier.held_slots().tolist():
        record = tier.table.slots[slot]
        name = (tier.table.key_of(slot), int(record["cell"]))
        if (node.machine.name, int(record["generation"])) in flipped:
            continue
        start = int(record["offset"]) + HEADER_BYTES
        stored = tier.arena.view(start, int(record["length"])).tobytes()
        if stored != right.get(name):
            faults.append(f"wrong bytes are visible in slot {slot}")
    return faults


def unsettled(nodes: Sequence[StorageNode | None], sessions: int) -> list[str]:
    """What is not yet as it must become; empty when all is."""
    alive = [node for node in nodes if node is not None]
    left = [f"node {index} is away" for index, node in enumerate(nodes) if node is None]
    epochs = {node.bulletin.now.map.epoch for node in alive}
    if len(epochs) > 1 or any(len(n.bulletin.now.map.nodes) != len(nodes) for n in alive):
        left.append(f"maps differ or are not whole: epochs {sorted(epochs)}")
    elif any(_lives_in_map(node) != lives_of(alive) for node in alive):
        left.append("the map names nodes in former lives")
    if left:
        return left
    for node in alive:
        left += [f"{node.process.name}: {what}" for what in _pending(node)]
    found = sum(node.node.stats().sessions for node in alive)
    if found > sessions:
        left.append(f"{found} sessions for {sessions} connections")
    if len({node.node.life.burials.digest() for node in alive}) > 1:
        left.append("not everybody has heard of every delete")
    if len({node.node.life.tenants.digest() for node in alive}) > 1:
        left.append("not everybody has heard of every erasure")
    left += [f"{node.process.name} is sealed" for node in alive if node.node.life.is_sealed]
    return [*left, *_directory(alive)]


def _lives_in_map(node: StorageNode) -> dict[int, int]:
    return {info.index: info.incarnation for info in node.bulletin.now.map.nodes}


def _pending(node: StorageNode) -> list[str]:
    """What hangs on a node that nobody is using."""
    left = []
    tier, stats = node.node.tier, node.node.stats()
    if node.bulletin.now.unreachable:
        left.append(f"{sorted(node.bulletin.now.unreachable)} are unreachable")
    pins = _pins_for_nothing(node)
    if stats.leases or pins:
        left.append(f"{stats.leases} leases, {pins} pins that no hold has")
    if stats.host.reserved_cells:
        left.append(f"{stats.host.reserved_cells} cells are reserved")
    frontier = int(tier.table.header["frontier"])
    missing_bytes = stats.host.capacity_bytes - (frontier - stats.host.retired_bytes)
    if missing_bytes and frontier < tier.arena.size_bytes:
        left.append(f"{missing_bytes} bytes of its memory are missing")
    left += disk_pending(node)
    standing = node.neighbourhood._standing
    if standing is None:
        left.append("has no place in the map")
    else:
        if not standing.announcer.settled:
            left.append("has something to announce")
        waiting = [stream.waiting_count for stream in standing.announcer._streams.values()]
        if max(waiting, default=0) > WAITING_CHANGES_MAX:
            left.append(f"{max(waiting)} changes are waiting")
    return left


def _pins_for_nothing(node: StorageNode) -> int:
    """Beyond one for each cell that is promised; and for what is on its way to the disk while
    that may be full of what is promised, so that it is tried again and again."""
    tier, writes = node.node.tier, node.node.behind._writes
    promised = {name for hold in node.node.life.holds._holds.values() for name in names_of(hold)}
    cells = tier.table.slots["cell"]
    held = [(tier.table.key_of(slot), int(cells[slot])) for slot in tier.held_slots().tolist()]
    pinned = tier._pins[tier.held_slots()].tolist()
    for_something = len(
        [name for name, pins in zip(held, pinned, strict=True) if pins and name in promised]
    )
    under_way = len(writes._under_way) if promised else 0
    return int(tier._pins.sum()) - for_something - under_way


def _directory(nodes: Sequence[StorageNode]) -> list[str]:
    """Where the homes know more or less than what the nodes hold."""
    left = []
    cluster_map = nodes[0].bulletin.now.map
    told = {node.index: 0 for node in nodes}
    for node in nodes:
        held = node.node.snapshot()
        if not len(held):
            continue
        homes = homes_of(held.spans, cluster_map)
        for home in nodes:
            mine = held.select((homes == home.index).any(axis=1))
            words = np.unique(as_words(mine.keys), axis=0)
            told[home.index] += len(words)
            found = home.directory.locate(mine.keys)
            rows = np.repeat(np.arange(len(mine)), found.counts).tolist()
            known = {
                row
                for row, who, mask in zip(rows, found.nodes, found.masks, strict=True)
                if who == node.index and int(mask) >> int(mine.cells[row]) & 1
            }
            if len(known) != len(mine):
                missing = len(mine) - len(known)
                left.append(f"home {home.index} lacks {missing} cells of node {node.index}")
    left += [
        f"home {home.index} knows {len(home.directory) - told[home.index]} too many"
        for home in nodes
        if len(home.directory) > told[home.index]
    ]
    return left


def names_held(node: StorageNode) -> set[bytes]:
    """The blocks of which a node has anything in either tier."""
    tier = node.node.tier
    found = {tier.table.key_of(slot) for slot in tier.held_slots().tolist()}
    if node.nvme is not None:
        found |= {record["key"].tobytes() for record in node.nvme.held_records()}
    return found


def readable(
    nodes: Sequence[StorageNode], prompts: Sequence[Prompt], flipped: set[tuple[str, int]]
) -> dict[int, int]:
    """How many tokens of each prompt the nodes together hold, whole and not expired."""
    there: set[Name] = set()
    for node in nodes:
        tier = node.node.tier
        slots = tier.held_slots()
        slots = slots[~tier.table.expired(slots, node.machine.clock.wall_ms())]
        for slot in slots.tolist():
            record = tier.table.slots[slot]
            if (node.machine.name, int(record["generation"])) not in flipped:
                there.add((tier.table.key_of(slot), int(record["cell"])))
        there |= readable_on_disk(node)
    found = {}
    for prompt in prompts:
        whole = {
            (start, stop)
            for key, start, stop in prompt.blocks
            if all((key, cell.index) in there for cell in GRID.cells)
        }
        tokens = 0
        while (tokens, tokens + BLOCK_TOKENS) in whole:
            tokens += BLOCK_TOKENS
        tokens = max([tokens, *(stop for start, stop in whole if start == tokens)])
        found[prompt.number] = min(tokens, len(prompt.tokens) - 1)
    return found
