//! A tap on the gradient of one weight: keeps few numbers of it, micro-batch by micro-batch.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use retune_kernels::GradientTap;

/// How entries are ranked: by `|gradient| / (|weight| + epsilon)^exponent`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring {
    /// 0 ranks by the gradient alone; a large one prefers small weights.
    pub exponent: f64,
    /// Keeps the divisor above zero.
    pub epsilon: f64,
    /// Leaves out entries that are changed already.
    pub only_unchanged: bool,
}

impl Scoring {
    /// Ranks all entries by the size of their gradient.
    pub const GRADIENT: Self = Self { exponent: 0.0, epsilon: 0.0, only_unchanged: false };

    /// Returns the score of one entry.
    pub fn score(&self, gradient: f32, weight: f32) -> f32 {
        let size = gradient.abs();
        if self.exponent == 0.0 {
            return size;
        }
        let divisor = f64::from(weight.abs()) + self.epsilon;
        let divisor = if self.exponent == 1.0 { divisor } else { divisor.powf(self.exponent) };
        (f64::from(size) / divisor) as f32
    }
}

/// What an open tap has gathered.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Window {
    /// How many candidates the next gradient decides; 0 once they are decided.
    pub room: usize,
    /// Watched entries, ascending.
    pub candidates: Vec<u32>,
    /// The weight at them, without its change.
    pub weights: Vec<f32>,
    /// Their gradients of the step that is under way.
    pub pending: Vec<f32>,
    /// Sums of their gradients over the steps before it.
    pub sums: Vec<f32>,
    /// Sums of the squares.
    pub squares: Vec<f32>,
    /// How many steps those sums are over.
    pub updates: u64,
}

/// Makes several taps look for the best entries of all their weights together: what each keeps is
/// beaten by fewer than that many in the weights seen before it.
#[derive(Debug)]
pub struct Pool {
    best: Mutex<Best>,
}

impl Pool {
    /// Makes room for `room` entries.
    pub fn new(room: usize) -> Arc<Self> {
        Arc::new(Self { best: Mutex::new(Best::new(room)) })
    }

    fn lock(&self) -> MutexGuard<'_, Best> {
        self.best.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the least score that may still be among the best.
    fn least(&self) -> f32 {
        let mut best = self.lock();
        best.cut();
        f32::from_bits((best.threshold >> 32) as u32)
    }

    fn offer(&self, scores: impl Iterator<Item = f32>) {
        let mut best = self.lock();
        scores.for_each(|score| best.offer(0, score));
    }
}

/// Watches the gradient of one weight.
///
/// The first gradient after [`Tap::open`] decides which entries are watched; from then on only
/// theirs is kept.
#[derive(Debug)]
pub struct Tap {
    scoring: Scoring,
    window: Mutex<Option<Window>>,
    /// What decides beside this weight's own entries, until the first gradient has come.
    pool: Mutex<Option<Arc<Pool>>>,
}

impl Tap {
    /// Makes a closed tap.
    pub fn new(scoring: Scoring) -> Self {
        Self { scoring, window: Mutex::new(None), pool: Mutex::new(None) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Window>> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how entries are ranked.
    pub fn scoring(&self) -> Scoring {
        self.scoring
    }

    /// Starts anew, to watch the `room` best entries of the next gradient.
    pub fn open(&self, room: usize) {
        *self.lock() = Some(Window { room, ..Window::default() });
    }

    /// Starts anew, to watch those entries of the next gradient that are among the pool's best so far.
    pub fn open_in(&self, pool: &Arc<Pool>) {
        let room = pool.lock().room;
        *self.pool.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(pool));
        self.open(room);
    }

    /// Stops watching and hands over what was gathered.
    pub fn close(&self) -> Option<Window> {
        self.lock().take()
    }

    /// Copies what is gathered so far.
    pub fn window(&self) -> Option<Window> {
        self.lock().clone()
    }

    /// Puts back what [`Tap::window`] gave.
    pub fn restore(&self, window: Option<Window>) {
        *self.lock() = window;
    }

    /// Ends a step: what is pending goes into the sums.
    pub fn end_step(&self) {
        if let Some(window) = self.lock().as_mut() {
            window.sums.resize(window.pending.len(), 0.0);
            window.squares.resize(window.pending.len(), 0.0);
            for (place, g) in window.pending.iter_mut().enumerate() {
                window.sums[place] += *g;
                window.squares[place] += *g * *g;
                *g = 0.0;
            }
            window.updates += 1;
        }
    }
}

/// Entries looked at together: what is below the best so far is passed over in one comparison.
const BLOCK: usize = 64;

impl Tap {
    /// Offers the entries of a gradient whose rows have `columns`, but those in `skipped`.
    fn rank(
        &self,
        best: &mut Best,
        gradient: &[f32],
        columns: usize,
        weight: &dyn Fn(usize, &mut [f32]),
        skipped: &[u32],
    ) {
        let mut skipped = skipped.iter().copied().peekable();
        if self.scoring.exponent == 0.0 {
            for (number, block) in gradient.chunks(BLOCK).enumerate() {
                let start = number * BLOCK;
                if block.iter().fold(0.0_f32, |most, g| most.max(g.abs())) < best.least() {
                    continue;
                }
                while skipped.next_if(|index| (*index as usize) < start).is_some() {}
                for (place, g) in block.iter().enumerate() {
                    let index = (start + place) as u32;
                    if skipped.next_if_eq(&index).is_none() {
                        best.offer(index, g.abs());
                    }
                }
            }
            return;
        }
        let mut row = vec![0.0; columns];
        for (number, gradient) in gradient.chunks(columns.max(1)).enumerate() {
            weight(number, &mut row);
            for (column, (g, w)) in gradient.iter().zip(&row).enumerate() {
                let index = (number * columns + column) as u32;
                if skipped.next_if_eq(&index).is_none() {
                    best.offer(index, self.scoring.score(*g, *w));
                }
            }
        }
    }
}

impl GradientTap for Tap {
    fn is_open(&self) -> bool {
        self.lock().is_some()
    }

    fn watched(&self) -> Option<Vec<u32>> {
        let window = self.lock();
        window.as_ref().filter(|window| window.room == 0).map(|window| window.candidates.clone())
    }

    fn see_watched(&self, gradient: &[f32]) {
        if let Some(window) = self.lock().as_mut() {
            for (sum, g) in window.pending.iter_mut().zip(gradient) {
                *sum += g;
            }
        }
    }

    fn see(
        &self,
        gradient: &[f32],
        columns: usize,
        weight: &dyn Fn(usize, &mut [f32]),
        indices: &[u32],
    ) {
        let mut guard = self.lock();
        let Some(window) = guard.as_mut() else { return };
        if window.room > 0 {
            let skipped = if self.scoring.only_unchanged { indices } else { &[] };
            let pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner).take();
            let least = pool.as_ref().map_or(0.0, |pool| pool.least());
            let mut best = Best::from(window.room, least);
            self.rank(&mut best, gradient, columns, weight, skipped);
            if let Some(pool) = pool {
                pool.offer(best.scores());
            }
            window.room = 0;
            window.candidates = best.into_indices();
            window.pending = vec![0.0; window.candidates.len()];
            window.weights = read_at(&window.candidates, columns, weight);
        }
        for (sum, index) in window.pending.iter_mut().zip(&window.candidates) {
            *sum += gradient[*index as usize];
        }
    }
}

/// Reads a weight at ascending indices.
fn read_at(indices: &[u32], columns: usize, weight: &dyn Fn(usize, &mut [f32])) -> Vec<f32> {
    let mut row = vec![0.0; columns];
    let mut known = usize::MAX;
    let read = |index: &u32| {
        let place = *index as usize;
        if place / columns != known {
            known = place / columns;
            weight(known, &mut row);
        }
        row[place % columns]
    };
    indices.iter().map(read).collect()
}

/// Keeps the best of many entries in memory of twice their number.
///
/// Of equal scores the lower index wins; what is not a number never does.
#[derive(Debug)]
pub struct Best {
    room: usize,
    /// Score bits above, index reversed below: a larger key is a better entry.
    keys: Vec<u64>,
    threshold: u64,
}

impl Best {
    /// Makes room for `room` entries.
    pub fn new(room: usize) -> Self {
        Self { room, keys: Vec::new(), threshold: 0 }
    }

    /// Makes room for `room` entries with a score of at least `least`.
    fn from(room: usize, least: f32) -> Self {
        let threshold = (u64::from(least.to_bits()) << 32).saturating_sub(1);
        Self { threshold, ..Self::new(room) }
    }

    /// Returns a score below which no entry is kept.
    fn least(&self) -> f32 {
        f32::from_bits((self.threshold >> 32) as u32)
    }

    /// Returns the scores of the best entries, in no order.
    fn scores(&mut self) -> impl Iterator<Item = f32> {
        self.cut();
        self.keys.iter().map(|key| f32::from_bits((key >> 32) as u32))
    }

    /// Offers an entry with a score of at least 0.
    pub fn offer(&mut self, index: u32, score: f32) {
        if score.is_nan() || self.room == 0 {
            return;
        }
        // The bits of floats that are not negative are in the order of the floats.
        let key = u64::from(score.abs().to_bits()) << 32 | u64::from(u32::MAX - index);
        if key <= self.threshold {
            return;
        }
        self.keys.push(key);
        if self.keys.len() >= self.room.saturating_mul(2).max(1024) {
            self.cut();
        }
    }

    fn cut(&mut self) {
        if self.keys.len() >= self.room && self.room > 0 {
            self.keys.select_nth_unstable_by(self.room - 1, |a, b| b.cmp(a));
            self.keys.truncate(self.room);
            self.threshold = self.keys[self.room - 1];
        }
    }

    /// Returns the indices of the best entries, ascending.
    pub fn into_indices(mut self) -> Vec<u32> {
        self.cut();
        let mut indices: Vec<u32> =
            self.keys.into_iter().map(|key| u32::MAX - key as u32).collect();
        indices.sort_unstable();
        indices
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_kept_whatever_the_order_and_ties_go_to_the_lower_index() {
        let mut random = crate::random::Seed(5).stream("best", &[]);
        for room in [1, 7, 600, 3000] {
            let scores: Vec<f32> = (0..5000).map(|_| random.below(400) as f32).collect();
            let mut best = Best::new(room);
            scores.iter().enumerate().for_each(|(i, s)| best.offer(i as u32, *s));
            best.offer(9999, f32::NAN);
            let mut order: Vec<u32> = (0..5000).collect();
            order
                .sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b)));
            let mut expected = order[..room].to_vec();
            expected.sort_unstable();
            assert_eq!(best.into_indices(), expected, "room {room}");
        }
    }

    #[test]
    fn the_first_gradient_decides_and_later_ones_add_up() {
        let tap = Tap::new(Scoring::GRADIENT);
        let no_weight = |_: usize, _: &mut [f32]| {};
        tap.see(&[9.0; 4], 2, &no_weight, &[]);
        assert_eq!(tap.window(), None);
        tap.open(2);
        tap.see(&[1.0, -5.0, 2.0, 0.5], 2, &no_weight, &[]);
        tap.see(&[10.0, 1.0, 1.0, 90.0], 2, &no_weight, &[]);
        tap.end_step();
        tap.see(&[0.0, 2.0, 2.0, 0.0], 2, &no_weight, &[]);
        let copy = tap.window();
        tap.end_step();
        let window = tap.close().unwrap();
        assert_eq!(window.candidates, [1, 2]);
        // Steps are (-5 + 1, 2 + 1) and (2, 2).
        assert_eq!(window.sums, [-2.0, 5.0]);
        assert_eq!(window.squares, [20.0, 13.0]);
        assert_eq!(window.updates, 2);
        // Put back in the middle, it ends the same.
        tap.restore(copy);
        tap.end_step();
        assert_eq!(tap.close(), Some(window));
    }

    #[test]
    fn taps_of_one_pool_keep_the_best_of_all_weights_and_little_beside() {
        let mut random = crate::random::Seed(6).stream("pool", &[]);
        let no_weight = |_: usize, _: &mut [f32]| {};
        let weights: Vec<Vec<f32>> =
            (0..9).map(|_| (0..500).map(|_| random.below(300) as f32 - 150.0).collect()).collect();
        for (room, changed) in [(1, vec![]), (40, vec![0, 63, 64, 130, 499]), (9999, vec![7])] {
            let scoring = Scoring { only_unchanged: true, ..Scoring::GRADIENT };
            let pool = Pool::new(room);
            let taps: Vec<Tap> = weights.iter().map(|_| Tap::new(scoring)).collect();
            for (tap, gradient) in taps.iter().zip(&weights) {
                tap.open_in(&pool);
                tap.see(gradient, 20, &no_weight, &changed);
            }
            let kept: Vec<(usize, u32)> = taps
                .iter()
                .enumerate()
                .flat_map(|(place, tap)| {
                    let window = tap.close().unwrap();
                    window.candidates.into_iter().map(move |index| (place, index))
                })
                .collect();
            let mut best: Vec<(usize, u32)> = (0..9)
                .flat_map(|place| (0..500).map(move |index| (place, index)))
                .filter(|(_, index)| !changed.contains(index))
                .collect();
            // Stable: ties go to the earlier weight and the lower index.
            best.sort_by_key(|(place, index)| -weights[*place][*index as usize].abs() as i32);
            assert!(best.iter().take(room).all(|entry| kept.contains(entry)), "room {room}");
            assert!(!kept.iter().any(|(_, index)| changed.contains(index)));
            // Each weight may keep one more that equals the last of the best.
            assert!(kept.len() <= 6 * room + 9, "{} kept for room {room}", kept.len());
        }
    }

    #[test]
    fn small_weights_and_unchanged_entries_can_be_preferred() {
        let tap = Tap::new(Scoring { exponent: 1.0, epsilon: 0.5, only_unchanged: true });
        let weight =
            |row: usize, out: &mut [f32]| out.copy_from_slice([&[0.0, 9.5], &[1.5, 0.0]][row]);
        tap.open(1);
        // Scores are 2, 1, 4 (changed already) and 1.
        tap.see(&[1.0, 10.0, 8.0, 0.5], 2, &weight, &[2]);
        assert_eq!(tap.close().unwrap().candidates, [0]);
    }
}
