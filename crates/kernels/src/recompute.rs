//! Activations that backward computes again instead of keeping them.
//!
//! The output of a norm or a gated activation is cheap to compute from what its own backward keeps
//! anyhow. Such an operation [notes](note) how; a linear layer behind it, which needs its input
//! for the weight's gradient, then keeps the recipe and lets the numbers go.

use std::cell::RefCell;
use std::fmt;
use std::sync::{Arc, OnceLock, Weak};

use burn_backend::Bytes;
use burn_flex::FlexTensor;

/// How to compute a tensor again, and the tensor once that was done.
struct Recipe {
    compute: Box<dyn Fn() -> FlexTensor + Send + Sync>,
    /// Filled by the first of several layers that read the same input, and dropped with the last.
    again: OnceLock<FlexTensor>,
}

thread_local! {
    /// What was noted of tensors that may still be alive. The numbers are held weakly: a piece of
    /// memory that is lent to another tensor has another owner, and is not found here.
    static NOTED: RefCell<Vec<(Weak<Bytes>, Arc<Recipe>)>> = const { RefCell::new(Vec::new()) };
}

/// Notes how the numbers of `output` can be computed again, bit by bit.
pub(crate) fn note(output: &FlexTensor, compute: impl Fn() -> FlexTensor + Send + Sync + 'static) {
    let recipe = Recipe { compute: Box::new(compute), again: OnceLock::new() };
    let noted = (Arc::downgrade(&output.data_arc()), Arc::new(recipe));
    NOTED.with_borrow_mut(|list| {
        list.retain(|(numbers, _)| numbers.strong_count() > 0);
        list.push(noted);
    });
}

/// A tensor kept for backward: its numbers, or how to compute them.
#[derive(Clone)]
pub(crate) enum Kept {
    Numbers(FlexTensor),
    Recipe(Again),
}

/// A shared recipe.
#[derive(Clone)]
pub(crate) struct Again(Arc<Recipe>);

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Numbers(tensor) => tensor.fmt(f),
            Self::Recipe(_) => f.write_str("Recipe"),
        }
    }
}

impl Kept {
    /// Keeps as little of `tensor` as it takes.
    pub(crate) fn of(tensor: &FlexTensor) -> Self {
        let numbers = Arc::as_ptr(&tensor.data_arc());
        // Only whole tensors are noted, so only a whole one is the same.
        let whole = tensor.layout().contiguous_offsets()
            == Some((0, tensor.bytes().len() / size_of::<f32>()));
        let recipe = NOTED.with_borrow(|list| {
            let same = |(of, _): &&(Weak<Bytes>, _)| {
                of.strong_count() > 0 && std::ptr::eq(of.as_ptr(), numbers)
            };
            list.iter().find(same).map(|(_, recipe)| Arc::clone(recipe))
        });
        match recipe {
            Some(recipe) if whole => Self::Recipe(Again(recipe)),
            _ => Self::Numbers(tensor.clone()),
        }
    }

    /// Gives the tensor.
    pub(crate) fn tensor(&self) -> &FlexTensor {
        match self {
            Self::Numbers(tensor) => tensor,
            Self::Recipe(Again(recipe)) => recipe.again.get_or_init(|| (recipe.compute)()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::tape::{from_values, values};

    fn tensor() -> FlexTensor {
        from_values(vec![1.0, 2.0], [1, 2])
    }

    #[test]
    fn what_was_noted_is_computed_once_for_all() {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let output = tensor();
        note(&output, move || {
            counted.fetch_add(1, Ordering::Relaxed);
            tensor()
        });
        let [first, second] = [Kept::of(&output), Kept::of(&output)];
        drop(output);
        assert!(matches!(first, Kept::Recipe(_)));
        assert_eq!(values(first.tensor()), [1.0, 2.0]);
        assert_eq!(values(second.tensor()), [1.0, 2.0]);
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn other_tensors_are_kept_as_they_are() {
        let output = tensor();
        note(&output, || unreachable!("nobody asks"));
        let other = tensor();
        assert!(matches!(Kept::of(&other), Kept::Numbers(_)));
        // The same numbers in another shape are still the same; a changed copy is not.
        let mut changed = output.clone();
        changed.storage_mut::<f32>()[0] = 5.0;
        assert!(matches!(Kept::of(&changed), Kept::Numbers(_)));
        drop(output);
        let later: Vec<FlexTensor> = (0..50).map(|_| tensor()).collect();
        assert!(later.iter().all(|tensor| matches!(Kept::of(tensor), Kept::Numbers(_))));
    }
}
