//! What callers send: numbers in decimal or hex, in the path, the query or a JSON body.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use mirror_proto::InvalidField;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::error::ApiError;

/// A 64-bit number: JSON has no more than 53 bits for sure, so it may be text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Text")]
pub(super) struct Number(pub(super) u64);

#[derive(Deserialize)]
#[serde(untagged)]
enum Text {
    Number(u64),
    Text(String),
}

impl TryFrom<Text> for Number {
    type Error = String;

    fn try_from(text: Text) -> Result<Self, String> {
        match text {
            Text::Number(number) => Ok(Self(number)),
            Text::Text(text) => number(&text).map(Self),
        }
    }
}

fn number(text: &str) -> Result<u64, String> {
    let digits = text.trim();
    let parsed = match digits
        .strip_prefix("0x")
        .or_else(|| digits.strip_prefix("0X"))
    {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    parsed.map_err(|_| format!("{text:?} is no number from 0 to 2^64 - 1, decimal or 0x…"))
}

/// The id of a VM in the path.
pub(super) struct VmId(pub(super) u64);

impl<S: Send + Sync> FromRequestParts<S> for VmId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let text = path.map(|Path(text)| text).unwrap_or_default();
        let id = number(&text).map_err(|reason| InvalidField::new("vm", reason))?;
        Ok(Self(id))
    }
}

/// The query as words; [`Asked::number`] takes one out.
pub(super) struct Asked(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Asked {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query = Query::<Vec<(String, String)>>::from_request_parts(parts, state).await;
        let query = query.map_err(|error| InvalidField::new("query", error.body_text()))?;
        Ok(Self(query.0))
    }
}

impl Asked {
    fn word(&self, name: &str) -> Option<&str> {
        let mut named = self.0.iter().filter(|(word, _)| word == name);
        named.next().map(|(_, value)| value.as_str())
    }

    /// A number, or what it is when nobody says.
    pub(super) fn number(&self, name: &str, default: u64) -> Result<u64, ApiError> {
        let Some(text) = self.word(name) else {
            return Ok(default);
        };
        Ok(number(text).map_err(|reason| InvalidField::new(name, reason))?)
    }

    /// A number of things, at most `limit`.
    pub(super) fn count(
        &self,
        name: &str,
        default: usize,
        limit: usize,
    ) -> Result<usize, ApiError> {
        let given = self.number(name, default as u64)?;
        let within = usize::try_from(given)
            .ok()
            .filter(|count| (1..=limit).contains(count));
        within.ok_or_else(|| {
            InvalidField::new(name, format!("{given} is outside 1..={limit}")).into()
        })
    }

    /// `true` or `false`; false when nobody says.
    pub(super) fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.word(name) {
            None | Some("false" | "0") => Ok(false),
            Some("true" | "1") => Ok(true),
            Some(other) => {
                let reason = format!("{other:?} is neither true nor false");
                Err(InvalidField::new(name, reason).into())
            }
        }
    }
}

/// A JSON body.
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(body)) => Ok(Self(body)),
            Err(JsonRejection::BytesRejection(error)) => Err(ApiError::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "TOO_LARGE",
                format!(
                    "{}, the limit is {} bytes",
                    error.body_text(),
                    super::MAX_BODY
                ),
            )),
            Err(error) => Err(InvalidField::new("body", error.body_text()).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal_or_hex() {
        for (text, expected) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            (" 0x1000 ", Some(0x1000)),
            ("0Xff", Some(255)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("0x", None),
            ("", None),
            ("-1", None),
            ("1G", None),
        ] {
            assert_eq!(number(text).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn words_of_a_query_are_judged_by_their_name() {
        let asked = Asked(vec![
            ("gpa".into(), "0x2000".into()),
            ("cells".into(), "9".into()),
            ("module".into(), "maybe".into()),
        ]);
        assert_eq!(asked.number("gpa", 0), Ok(0x2000));
        assert_eq!(asked.number("cell", 7), Ok(7));
        assert_eq!(asked.count("cells", 1, 9), Ok(9));
        assert!(asked.count("cells", 1, 8).is_err());
        assert!(asked.flag("module").is_err());
        assert_eq!(asked.flag("other"), Ok(false));
    }
}
