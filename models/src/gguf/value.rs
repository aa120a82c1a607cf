//! The values of a GGUF file's metadata.

/// What a key of the metadata says. Numbers of all widths are the widest of their kind.
#[derive(Clone, PartialEq, Debug)]
pub enum Value {
    /// u8, u16, u32 or u64.
    Unsigned(u64),
    /// i8, i16, i32 or i64.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// A text.
    String(String),
    /// Many of one kind.
    Array(Array),
}

/// An array of the metadata.
#[derive(Clone, PartialEq, Debug)]
pub enum Array {
    /// u8, u16, u32 or u64.
    Unsigned(Vec<u64>),
    /// i8, i16, i32 or i64.
    Signed(Vec<i64>),
    /// f32 or f64.
    Float(Vec<f64>),
    /// True or false.
    Bool(Vec<bool>),
    /// Texts.
    String(Vec<String>),
    /// Arrays.
    Array(Vec<Array>),
}

impl Value {
    /// The number, if it is an integer from 0 on.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::Unsigned(x) => Some(x),
            Value::Signed(x) => u64::try_from(x).ok(),
            _ => None,
        }
    }

    /// The number, rounded if it is an integer beyond 2⁵³.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::Unsigned(x) => Some(x as f64),
            Value::Signed(x) => Some(x as f64),
            Value::Float(x) => Some(x),
            _ => None,
        }
    }

    /// The truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(x) => Some(x),
            _ => None,
        }
    }

    /// The text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(x) => Some(x),
            _ => None,
        }
    }

    /// The texts.
    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            Value::Array(Array::String(x)) => Some(x),
            _ => None,
        }
    }

    /// The numbers, if all are integers from 0 on.
    pub fn as_u64s(&self) -> Option<Vec<u64>> {
        match self {
            Value::Array(Array::Unsigned(x)) => Some(x.clone()),
            Value::Array(Array::Signed(x)) => x.iter().map(|&x| u64::try_from(x).ok()).collect(),
            _ => None,
        }
    }

    /// The numbers, rounded where they are integers beyond 2⁵³.
    pub fn as_f64s(&self) -> Option<Vec<f64>> {
        match self {
            Value::Array(Array::Unsigned(x)) => Some(x.iter().map(|&x| x as f64).collect()),
            Value::Array(Array::Signed(x)) => Some(x.iter().map(|&x| x as f64).collect()),
            Value::Array(Array::Float(x)) => Some(x.clone()),
            _ => None,
        }
    }

    /// What it is, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Value::Unsigned(_) => "an unsigned integer",
            Value::Signed(_) => "a signed integer",
            Value::Float(_) => "a float",
            Value::Bool(_) => "a truth value",
            Value::String(_) => "a text",
            Value::Array(Array::Unsigned(_)) => "an array of unsigned integers",
            Value::Array(Array::Signed(_)) => "an array of signed integers",
            Value::Array(Array::Float(_)) => "an array of floats",
            Value::Array(Array::Bool(_)) => "an array of truth values",
            Value::Array(Array::String(_)) => "an array of texts",
            Value::Array(Array::Array(_)) => "an array of arrays",
        }
    }
}
