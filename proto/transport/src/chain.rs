//! Errors as one line of text.

use std::error::Error;

/// An error with all its causes, as one sentence.
///
/// tonic's errors say "transport error" and keep the reason in their sources, where the layers in
/// between repeat it: what was said already is left out.
pub fn error_chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Link {
        text: &'static str,
        #[source]
        cause: Option<Box<Link>>,
    }

    #[test]
    fn causes_follow_once_each() {
        let chain = |texts: &[&'static str]| {
            texts
                .iter()
                .rev()
                .fold(None, |cause, text| Some(Box::new(Link { text, cause })))
        };
        for (texts, expected) in [
            (&["alone"][..], "alone"),
            (
                &["no answer", "transport error", "refused"],
                "no answer: transport error: refused",
            ),
            (&["no answer", "refused", "refused"], "no answer: refused"),
        ] {
            assert_eq!(error_chain(&*chain(texts).unwrap()), expected);
        }
    }
}
