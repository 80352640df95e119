"""A document store on a separate database, and one built-in classifier for all tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from config import Settings
from mongo_client import DocumentStore
from tests.review.review_site import settings_of


@pytest.fixture(autouse=True)
def _one_classifier(built_in_classifier: None) -> None:
    """Use the same built-in classifier in every test."""


@pytest.fixture
def settings(mongodb_uri: str, db_name: str) -> Settings:
    return settings_of(mongodb_uri, db_name)


@pytest.fixture
async def store(settings: Settings) -> AsyncIterator[DocumentStore]:
    opened = DocumentStore(settings)
    yield opened
    await opened.close()
