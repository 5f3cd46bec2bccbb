//! Options declared once: the struct, its parsing, its help and its schema.

use crate::{
    bounds::{Bounds, Edge},
    item::{Item, Table},
    reader::Reader,
    value::{ChoiceSpec, OptionValue},
};
use std::ops::RangeBounds;

/// A table of options, declared by [`crate::options!`].
pub trait Options: Sized + Clone + Default {
    /// The table's name in a recipe.
    const NAME: &'static str;
    /// What the options are for: the struct's doc comment.
    const ABOUT: &'static str;

    /// Describes each option, in the order declared.
    fn specs() -> &'static [OptionSpec];

    /// Reads the options of a table; every mistake is noted in `reader`, and the value is then
    /// only good for reading on.
    fn read(reader: &mut Reader<'_>) -> Self;

    /// Writes the options with every default filled in; reading gives them back.
    fn write(&self) -> Table;

    /// Checks what concerns several options together; called by `read` when each one is right by
    /// itself. Mistakes go to [`Reader::error`], by the key they concern.
    fn validate(&self, _reader: &mut Reader<'_>) {}
}

/// What is known about one option.
#[derive(Clone, Debug)]
pub struct OptionSpec {
    /// The key.
    pub name: &'static str,
    /// What it does: the field's doc comment.
    pub help: String,
    /// The kind of value, such as `integer`.
    pub kind: String,
    /// The value of a missing key; `None` when there is none.
    pub default: Option<Item>,
    /// Whether the key must be written.
    pub required: bool,
    /// The range of the number.
    pub bounds: Bounds,
    /// The words it may be.
    pub choices: &'static [ChoiceSpec],
    /// The options below it, when it is a table.
    pub nested: Option<Nested>,
    /// What other tools call it; only used to suggest the name it has here.
    pub foreign: &'static [&'static str],
    /// The JSON Schema of its value, without range and default.
    pub schema: serde_json::Value,
}

/// The options of a table below an option.
#[derive(Clone, Copy, Debug)]
pub struct Nested {
    /// The options.
    pub specs: &'static [OptionSpec],
    /// How often the table occurs.
    pub presence: Presence,
}

/// How often a nested table occurs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Always: a missing `[table]` has all defaults.
    Always,
    /// Once or not at all, which makes a difference.
    Optional,
    /// Any number of times, as `[[table]]`.
    List,
}

/// One declared option on its way into [`OptionSpec`] and [`Reader::field`].
#[derive(Clone, Debug)]
pub struct Field<T> {
    name: &'static str,
    help: &'static str,
    default: Option<T>,
    bounds: Bounds,
    foreign: &'static [&'static str],
}

impl<T: OptionValue> Field<T> {
    /// Declares an option; `name` may carry Rust's `r#`.
    pub fn new(name: &'static str, help: &'static str) -> Self {
        let name = name.strip_prefix("r#").unwrap_or(name);
        Self { name, help, default: None, bounds: Bounds::NONE, foreign: &[] }
    }

    /// Sets the value of a missing key.
    #[must_use]
    pub fn default(self, default: T) -> Self {
        Self { default: Some(default), ..self }
    }

    /// Sets the range.
    #[must_use]
    pub fn bounds(self, range: &impl RangeBounds<T::Edge>) -> Self
    where
        T::Edge: Edge,
    {
        Self { bounds: Bounds::of(range), ..self }
    }

    /// Sets what other tools call it.
    #[must_use]
    pub fn foreign(self, foreign: &'static [&'static str]) -> Self {
        Self { foreign, ..self }
    }

    /// Returns the value of a missing key, or a stand-in when it has to be written.
    pub fn into_default(self) -> T {
        self.default.unwrap_or_default()
    }

    /// Describes the option.
    pub fn spec(self) -> OptionSpec {
        let lines: Vec<_> = self.help.lines().map(str::trim).collect();
        OptionSpec {
            name: self.name,
            help: lines.join(" ").trim().to_owned(),
            kind: T::kind(),
            required: self.default.is_none() && T::required(),
            default: self.default.as_ref().and_then(T::to_item),
            bounds: self.bounds,
            choices: T::choices(),
            nested: T::nested(),
            foreign: self.foreign,
            schema: T::schema(),
        }
    }

    /// Reads the option from its table.
    pub fn read(self, reader: &mut Reader<'_>) -> T {
        for foreign in self.foreign {
            reader.declare_foreign(foreign, self.name);
        }
        reader.field(self.name, self.default, self.bounds)
    }

    /// Writes the option into its table.
    pub fn write(self, value: &T, table: &mut Table) {
        if let Some(item) = value.to_item() {
            table.insert(self.name, item);
        }
    }
}

/// Declares a struct of options, and everything that follows from it.
///
/// Each field is `/// help`, `name: type`, then in this order and each optional: `= default`,
/// `, in range`, `, also "name elsewhere"`, and a semicolon. A field without a default must be
/// written in the recipe, unless its type can do without (`Option`, maps, nested options). The
/// word in parentheses is the table's name; `validate = function` after it names a
/// `fn(&Self, &mut Reader)` for checks across fields.
///
/// # Examples
/// ```
/// use retune_options::{Document, Options, Reader, above, options};
/// options! {
///     /// Low-rank update of chosen weights.
///     pub struct LoraOptions("lora", validate = LoraOptions::check) {
///         /// Rank of the update.
///         rank: usize = 8, in 1..=4096, also "r" | "lora_r";
///         /// Scale of the update.
///         alpha: f64 = 16.0, in above(0.0), also "lora_alpha";
///         /// Name of the adapter.
///         name: Option<String>;
///     }
/// }
/// impl LoraOptions {
///     fn check(&self, reader: &mut Reader<'_>) {
///         if self.alpha < self.rank as f64 / 64.0 {
///             reader.warn("alpha", "`alpha` is tiny beside `rank`", "raise `alpha`");
///         }
///     }
/// }
/// let recipe = Document::parse("recipe.toml", "rank = 16\n")?;
/// let (lora, _warnings) = recipe.read(LoraOptions::read)?;
/// assert_eq!((lora.rank, lora.alpha, lora.name), (16, 16.0, None));
///
/// let slip = Document::parse("recipe.toml", "alpa = 16\n")?;
/// let report = slip.read(LoraOptions::read).unwrap_err();
/// assert_eq!(report.diagnostics()[0].help.as_deref(), Some("did you mean `alpha`?"));
/// # Ok::<(), retune_options::Report>(())
/// ```
#[macro_export]
macro_rules! options {
    (
        $(#[doc = $about:literal])+
        $vis:vis struct $Name:ident($table:literal $(, validate = $validate:path)?) {
            $(
                $(#[doc = $help:literal])+
                $field:ident : $ty:ty
                $(= $default:expr)?
                $(, in $range:expr)?
                $(, also $($foreign:literal)|+)?
                ;
            )*
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, PartialEq)]
        $vis struct $Name { $( $(#[doc = $help])+ pub $field: $ty, )* }

        const _: () = {
            /// One function per field, in a trait so that no method of the struct collides.
            trait Fields {
                $( fn $field() -> $crate::Field<$ty>; )*
            }

            impl Fields for $Name {
                $(
                    fn $field() -> $crate::Field<$ty> {
                        $crate::Field::<$ty>::new(stringify!($field), concat!($($help, "\n"),+))
                            $(.default($default))?
                            $(.bounds(&($range)))?
                            $(.foreign(&[$($foreign),+]))?
                    }
                )*
            }

            impl ::std::default::Default for $Name {
                fn default() -> Self {
                    Self { $( $field: <Self as Fields>::$field().into_default(), )* }
                }
            }

            impl $crate::Options for $Name {
                const NAME: &'static str = $table;
                const ABOUT: &'static str = concat!($($about, "\n"),+).trim_ascii();

                fn specs() -> &'static [$crate::OptionSpec] {
                    static SPECS: ::std::sync::LazyLock<::std::vec::Vec<$crate::OptionSpec>> =
                        ::std::sync::LazyLock::new(|| ::std::vec![$( <$Name as Fields>::$field().spec() ),*]);
                    &SPECS
                }

                fn read(reader: &mut $crate::Reader<'_>) -> Self {
                    let options = Self { $( $field: <Self as Fields>::$field().read(reader), )* };
                    if !reader.has_errors() {
                        $crate::Options::validate(&options, reader);
                    }
                    options
                }

                fn write(&self) -> $crate::Table {
                    let mut table = $crate::Table::default();
                    $( <Self as Fields>::$field().write(&self.$field, &mut table); )*
                    table
                }

                $(
                    fn validate(&self, reader: &mut $crate::Reader<'_>) {
                        $validate(self, reader);
                    }
                )?
            }

            impl $crate::OptionValue for $Name {
                type Edge = $crate::NoEdge;

                fn kind() -> ::std::string::String {
                    "table".to_owned()
                }

                fn from_item<'d>(
                    item: &'d $crate::Item,
                    place: &$crate::Place<'d>,
                ) -> ::std::option::Option<Self> {
                    place.reader(item).map(|mut reader| $crate::Options::read(&mut reader))
                }

                fn to_item(&self) -> ::std::option::Option<$crate::Item> {
                    ::std::option::Option::Some($crate::Options::write(self).into())
                }

                fn schema() -> $crate::Json {
                    $crate::schema(<Self as $crate::Options>::specs())
                }

                fn absent(place: &$crate::Place<'_>) -> ::std::option::Option<Self> {
                    ::std::option::Option::Some($crate::Options::read(&mut place.absent_reader()))
                }

                fn nested() -> ::std::option::Option<$crate::Nested> {
                    ::std::option::Option::Some($crate::Nested {
                        specs: <Self as $crate::Options>::specs(),
                        presence: $crate::Presence::Always,
                    })
                }

                fn required() -> bool {
                    <Self as $crate::Options>::specs().iter().any(|spec| spec.required)
                }
            }
        };
    };
}
