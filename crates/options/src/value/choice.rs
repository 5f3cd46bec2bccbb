//! Options that are one of a few words.

use crate::{
    item::{Item, Value},
    reader::{Place, list},
    report::Diagnostic,
    suggest,
};
use serde_json::json;

/// One word of a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChoiceSpec {
    /// The word as written in a recipe.
    pub name: &'static str,
    /// What it means.
    pub help: &'static str,
}

/// An enum whose variants a recipe names by words; [`crate::choice!`] implements it.
pub trait Choice: Copy + 'static {
    /// The variants with their words and meanings, in the order declared.
    const ALL: &'static [(Self, ChoiceSpec)];

    /// Returns the variant's word.
    fn name(self) -> &'static str;
}

/// Reads a choice; used by what [`crate::choice!`] makes.
pub fn read_choice<T: Choice>(item: &Item, place: &Place<'_>) -> Option<T> {
    let names: Vec<_> = T::ALL.iter().map(|(_, spec)| spec.name).collect();
    let expected = format!("one of {}", list(&names));
    let Value::String(word) = &item.value else {
        place.mismatch(item, &expected);
        return None;
    };
    if let Some((choice, _)) = T::ALL.iter().find(|(_, spec)| spec.name == word) {
        return Some(*choice);
    }
    let near = suggest::nearest(word, names.iter().copied());
    let error = Diagnostic::error(format!("`{}` must be {expected}", place.path()))
        .at(item.span)
        .label(format!("found {}", item.value.describe()));
    place.report(match near.as_slice() {
        [] => error,
        near => error.help(format!("did you mean {}?", list(near))),
    });
    None
}

/// Returns the JSON Schema of a choice; used by what [`crate::choice!`] makes.
pub fn schema_of_choice(choices: &[ChoiceSpec]) -> serde_json::Value {
    let one = |choice: &ChoiceSpec| json!({"const": choice.name, "description": choice.help});
    json!({"type": "string", "oneOf": choices.iter().map(one).collect::<Vec<_>>()})
}

/// Declares an enum whose variants are words in a recipe.
///
/// The doc comment of a variant is its help; the first variant is the default.
///
/// # Examples
/// ```
/// use retune_options::{Choice, choice};
/// choice! {
///     /// How the learning rate moves.
///     pub enum Schedule {
///         /// Falls as half a cosine.
///         Cosine = "cosine",
///         /// Stays as it is.
///         Constant = "constant",
///     }
/// }
/// assert_eq!(Schedule::default().name(), "cosine");
/// assert_eq!(Schedule::ALL[1].1.help, "Stays as it is.");
/// ```
#[macro_export]
macro_rules! choice {
    (
        $(#[doc = $about:literal])+
        $vis:vis enum $Name:ident {
            $( $(#[doc = $help:literal])+ $Variant:ident = $word:literal ),+ $(,)?
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        $vis enum $Name { $( $(#[doc = $help])+ $Variant ),+ }

        impl $crate::Choice for $Name {
            const ALL: &'static [(Self, $crate::ChoiceSpec)] = &[$((
                Self::$Variant,
                $crate::ChoiceSpec { name: $word, help: concat!($($help),+).trim_ascii() },
            )),+];

            fn name(self) -> &'static str {
                match self { $( Self::$Variant => $word ),+ }
            }
        }

        impl ::std::default::Default for $Name {
            fn default() -> Self {
                <Self as $crate::Choice>::ALL[0].0
            }
        }

        impl $crate::OptionValue for $Name {
            type Edge = $crate::NoEdge;

            fn kind() -> ::std::string::String {
                "word".to_owned()
            }

            fn from_item<'d>(
                item: &'d $crate::Item,
                place: &$crate::Place<'d>,
            ) -> ::std::option::Option<Self> {
                $crate::read_choice(item, place)
            }

            fn to_item(&self) -> ::std::option::Option<$crate::Item> {
                ::std::option::Option::Some($crate::Choice::name(*self).into())
            }

            fn schema() -> $crate::Json {
                $crate::schema_of_choice(<Self as $crate::OptionValue>::choices())
            }

            fn choices() -> &'static [$crate::ChoiceSpec] {
                const WORDS: &[$crate::ChoiceSpec] = &[$(
                    $crate::ChoiceSpec { name: $word, help: concat!($($help),+).trim_ascii() },
                )+];
                WORDS
            }
        }
    };
}
