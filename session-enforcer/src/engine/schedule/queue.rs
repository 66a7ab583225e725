//! Slots by due time: a heap in which each slot knows its heap index, so a moved or removed slot leaves no stale entry.

/// A heap with four children per node has half the depth of a binary heap. Each level that an entry moves costs a write
/// to a random memory location, while the times of four children are adjacent.
const CHILDREN: usize = 4;

/// The heap index of a slot that is not in the heap.
const NOWHERE: u32 = u32::MAX;

/// Slots by due time. A slot with due time `u64::MAX` is never due and not in the heap.
///
/// Slots are numbered from 0 without gaps. The time and the slot of an entry are in separate vectors: 12 bytes, where a
/// pair would take 16.
#[derive(Debug, Default)]
pub(super) struct Queue {
    due_ns: Vec<u64>,
    slots: Vec<u32>,
    /// Heap index by slot.
    heap_indexes: Vec<u32>,
}

impl Queue {
    /// Adds the slot after the last.
    pub(super) fn push(&mut self, due_ns: u64) {
        let slot = self.heap_indexes.len() as u32;
        self.heap_indexes.push(NOWHERE);
        self.set(slot, due_ns);
    }

    /// Removes a slot. The last slot takes its number.
    pub(super) fn swap_remove(&mut self, slot: u32) {
        self.set(slot, u64::MAX);
        self.heap_indexes.swap_remove(slot as usize);
        if let Some(heap_index) = self.heap_index(slot) {
            self.slots[heap_index] = slot;
        }
    }

    /// When the slot is due.
    pub(super) fn due_ns(&self, slot: u32) -> u64 {
        self.heap_index(slot)
            .map_or(u64::MAX, |heap_index| self.due_ns[heap_index])
    }

    /// The slot with the earliest due time, and that time.
    pub(super) fn first(&self) -> Option<(u64, u32)> {
        Some((*self.due_ns.first()?, *self.slots.first()?))
    }

    /// Sets the due time of a slot.
    pub(super) fn set(&mut self, slot: u32, due_ns: u64) {
        match self.heap_index(slot) {
            None if due_ns == u64::MAX => {}
            None => {
                let last = self.slots.len();
                self.due_ns.push(due_ns);
                self.slots.push(slot);
                self.move_to_order(last, due_ns, slot);
            }
            Some(heap_index) if due_ns == u64::MAX => self.vacate(heap_index),
            Some(heap_index) => self.move_to_order(heap_index, due_ns, slot),
        }
    }

    /// Releases memory beyond `capacity` slots.
    pub(super) fn shrink_to(&mut self, capacity: usize) {
        self.due_ns.shrink_to(capacity);
        self.slots.shrink_to(capacity);
        self.heap_indexes.shrink_to(capacity);
    }

    /// The heap index of a slot; `None` if the slot is not in the heap or does not exist.
    fn heap_index(&self, slot: u32) -> Option<usize> {
        let heap_index = *self.heap_indexes.get(slot as usize)?;
        (heap_index != NOWHERE).then_some(heap_index as usize)
    }

    /// Removes the entry at this index from the heap.
    fn vacate(&mut self, heap_index: usize) {
        self.heap_indexes[self.slots[heap_index] as usize] = NOWHERE;
        let (Some(due_ns), Some(slot)) = (self.due_ns.pop(), self.slots.pop()) else {
            return;
        };
        if heap_index < self.slots.len() {
            self.move_to_order(heap_index, due_ns, slot);
        }
    }

    /// Inserts an entry in heap order, starting at the free index `free`.
    fn move_to_order(&mut self, free: usize, due_ns: u64, slot: u32) {
        let raised = self.raise(free, due_ns);
        let heap_index = if raised == free {
            self.lower(free, due_ns)
        } else {
            raised
        };
        self.put(heap_index, due_ns, slot);
    }

    /// Moves the free index up while the parent is later than `due_ns`.
    fn raise(&mut self, mut free: usize, due_ns: u64) -> usize {
        while free > 0 {
            let parent = (free - 1) / CHILDREN;
            if self.due_ns[parent] <= due_ns {
                break;
            }
            self.put(free, self.due_ns[parent], self.slots[parent]);
            free = parent;
        }
        free
    }

    /// Moves the free index down while a child is earlier than `due_ns`.
    fn lower(&mut self, mut free: usize, due_ns: u64) -> usize {
        while let Some((earliest_ns, child)) = self.earliest_child(free)
            && earliest_ns < due_ns
        {
            self.put(free, earliest_ns, self.slots[child]);
            free = child;
        }
        free
    }

    fn earliest_child(&self, heap_index: usize) -> Option<(u64, usize)> {
        let first = heap_index * CHILDREN + 1;
        let end = self.due_ns.len().min(first + CHILDREN);
        let children = self.due_ns.get(first..end)?.iter();
        children
            .copied()
            .zip(first..)
            .min_by_key(|(due_ns, _)| *due_ns)
    }

    fn put(&mut self, heap_index: usize, due_ns: u64, slot: u32) {
        self.due_ns[heap_index] = due_ns;
        self.slots[heap_index] = slot;
        self.heap_indexes[slot as usize] = heap_index as u32;
    }
}

#[cfg(test)]
impl Queue {
    /// Allocated bytes of the vectors.
    pub(super) fn allocated(&self) -> usize {
        8 * self.due_ns.capacity() + 4 * (self.slots.capacity() + self.heap_indexes.capacity())
    }

    /// Number of slots in the heap.
    pub(super) fn waiting(&self) -> usize {
        self.slots.len()
    }

    /// Checks the heap order, and that slots and entries refer to each other.
    pub(super) fn assert_sound(&self, slots: usize) {
        assert_eq!(self.heap_indexes.len(), slots);
        assert_eq!(self.due_ns.len(), self.slots.len());
        for heap_index in 0..self.slots.len() {
            assert_eq!(self.heap_index(self.slots[heap_index]), Some(heap_index));
            let parent = heap_index.saturating_sub(1) / CHILDREN;
            assert!(self.due_ns[parent] <= self.due_ns[heap_index]);
            assert_ne!(self.due_ns[heap_index], u64::MAX);
        }
        let waiting = self
            .heap_indexes
            .iter()
            .filter(|heap_index| **heap_index != NOWHERE);
        assert_eq!(waiting.count(), self.slots.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(times: &[u64]) -> Queue {
        let mut queue = Queue::default();
        times.iter().for_each(|due_ns| queue.push(*due_ns));
        queue.assert_sound(times.len());
        queue
    }

    fn drained(mut queue: Queue) -> Vec<u64> {
        let slots = queue.heap_indexes.len();
        let mut times = Vec::new();
        while let Some((due_ns, slot)) = queue.first() {
            times.push(due_ns);
            queue.set(slot, u64::MAX);
            queue.assert_sound(slots);
        }
        times
    }

    #[test]
    fn times_come_in_order() {
        let times: Vec<u64> = (0..200).map(|i| i * 7919 % 200).collect();
        assert_eq!(drained(queue(&times)), (0..200).collect::<Vec<u64>>());
    }

    #[test]
    fn a_slot_is_moved_both_ways_out_and_in_again() {
        let mut queue = queue(&[10, 20, 30, 40, 50, 60, 70]);
        for (slot, due_ns) in [
            (0, 65),
            (6, 5),
            (3, 40),
            (2, u64::MAX),
            (2, u64::MAX),
            (2, 55),
        ] {
            queue.set(slot, due_ns);
            queue.assert_sound(7);
            assert_eq!(queue.due_ns(slot), due_ns);
        }
        assert_eq!(drained(queue), [5, 20, 40, 50, 55, 60, 65]);
    }

    #[test]
    fn an_entry_from_another_branch_rises_into_the_gap() {
        // 100 has the four children 101 to 104; the last entry, 3, is a child of 2.
        let mut queue = queue(&[1, 100, 2, 50, 60, 101, 102, 103, 104, 3]);
        queue.set(5, u64::MAX);
        queue.assert_sound(10);
        assert_eq!(drained(queue), [1, 2, 3, 50, 60, 100, 102, 103, 104]);
    }

    #[test]
    fn the_last_slot_takes_the_number_of_one_that_is_removed() {
        let mut queue = queue(&[10, 20, u64::MAX, 40]);
        queue.swap_remove(0);
        queue.assert_sound(3);
        assert_eq!(queue.due_ns(0), 40);
        queue.swap_remove(0);
        queue.assert_sound(2);
        assert_eq!(queue.due_ns(0), u64::MAX);
        queue.swap_remove(1);
        queue.swap_remove(0);
        assert_eq!(queue.first(), None);
        queue.assert_sound(0);
    }
}
