//! Medians and quartiles. Pure.

/// The summary of several measurements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    /// The median.
    pub(crate) median: f64,
    /// The lower quartile.
    pub(crate) low: f64,
    /// The upper quartile.
    pub(crate) high: f64,
    /// The number of values.
    pub(crate) count: usize,
}

impl Summary {
    /// Summarizes these values. `None` if there are none.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let sorted = sorted(values);
        Some(Self {
            median: quantile(&sorted, 0.5)?,
            low: quantile(&sorted, 0.25)?,
            high: quantile(&sorted, 0.75)?,
            count: values.len(),
        })
    }
}

/// Sorts the values.
pub(crate) fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The interpolated quantile of sorted values.
pub(crate) fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = last as f64 * share.clamp(0.0, 1.0);
    let below = place as usize;
    let above = (below + 1).min(last);
    Some(sorted[below] + (sorted[above] - sorted[below]) * (place - below as f64))
}

/// The ratio of each value to its counterpart of the same round. A disturbance of a whole round affects both.
pub(crate) fn ratios(values: &[f64], counterparts: &[f64]) -> Vec<f64> {
    let pairs = values.iter().zip(counterparts);
    pairs
        .map(|(value, counterpart)| value / counterpart)
        .collect()
}

/// The difference of each value and its counterpart of the same round.
pub(crate) fn differences(values: &[f64], counterparts: &[f64]) -> Vec<f64> {
    let pairs = values.iter().zip(counterparts);
    pairs
        .map(|(value, counterpart)| value - counterpart)
        .collect()
}

/// The order in which `count` parties take turns in a round (Williams, 1949). In `count` rounds each party
/// has each position once. In twice as many rounds each party follows each other party twice. So the state of
/// caches and clocks that one party leaves does not always affect the same one.
pub(crate) fn turns(count: usize, round: usize) -> impl Iterator<Item = usize> {
    let is_back = round / count % 2 == 1;
    (0..count).map(move |turn| {
        let turn = if is_back { count - 1 - turn } else { turn };
        // The sequence 0, 1, -1, 2, -2 and so on.
        let step = if turn % 2 == 0 {
            count - turn / 2
        } else {
            turn.div_ceil(2)
        };
        (step + round) % count
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_median_and_quartiles() {
        let summary = Summary::of(&[5.0, 1.0, 2.0, 4.0, 3.0]).unwrap();
        assert_eq!((summary.low, summary.median, summary.high), (2.0, 3.0, 4.0));
        assert_eq!(summary.count, 5);
        let even = Summary::of(&[1.0, 2.0]).unwrap();
        assert_eq!((even.low, even.median, even.high), (1.25, 1.5, 1.75));
        assert_eq!(Summary::of(&[7.0]).unwrap().high, 7.0);
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn quantiles_reach_from_the_least_to_the_greatest() {
        let values = sorted(&[30.0, 10.0, 20.0]);
        assert_eq!(quantile(&values, 0.0), Some(10.0));
        assert_eq!(quantile(&values, 1.0), Some(30.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn rounds_are_compared_one_by_one() {
        assert_eq!(ratios(&[3.0, 30.0], &[2.0, 20.0]), [1.5, 1.5]);
        assert_eq!(differences(&[3.0, 30.0], &[2.0, 20.0]), [1.0, 10.0]);
    }

    #[test]
    fn each_has_each_place_as_often_and_comes_behind_each_other_as_often() {
        for count in 1..12 {
            let mut places = vec![vec![0; count]; count];
            let mut behind = vec![vec![0; count]; count];
            for round in 0..2 * count {
                let order: Vec<usize> = turns(count, round).collect();
                for (place, one) in order.iter().enumerate() {
                    places[*one][place] += 1;
                }
                for pair in order.windows(2) {
                    behind[pair[1]][pair[0]] += 1;
                }
            }
            assert!(
                places.iter().flatten().all(|times| *times == 2),
                "{places:?}"
            );
            for (one, others) in behind.iter().enumerate() {
                let expected = (0..count).map(|other| if other == one { 0 } else { 2 });
                assert!(others.iter().copied().eq(expected), "{behind:?}");
            }
        }
    }
}
