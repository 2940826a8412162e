"""What there is to train on, and which LightningModule fits it, by name. Imports no torch, so that listing is instant.

A data module of one's own is a LightningDataModule with some attributes, of the class; the last two may as well be of
the instance:

===============  =======================================================================================
``model``        a key of :data:`MODELS`: the LightningModule that ``fit`` trains on it; default: ``language_model``
``metric``       the metric of that model that ``compare`` shows, such as ``accuracy``; or give ``--metric``
``defaults``     what ``fit`` and ``compare`` take unless told otherwise, a dict with any of ``model`` (options of
                 the model: ``dim``, ``depth``, ``learning_rate``, ...), ``mixer`` (options of every mixer that has
                 them: ``num_heads``, ``head_dim``, ...), ``steps``, and ``validate_every`` (steps)
``vocab_size``   number of token ids
``num_classes``  number of classes (classifiers)
===============  =======================================================================================

``fit --data my_package.MyData`` and ``compare --data my_package.MyData`` train on it; a package may give it a name with
the entry-point group ``lightning_mixers.data``. Its loaders yield batches, each a dict:

================  ============  ======================================================================================
``tokens``        (B, T) int64  ids in 0..vocab_size-1
``targets``       (B, T) int64  language models: the answer that is due at each position, which for the next token is
                                ``tokens`` one place to the left (the model does not shift); -100 where nothing is asked
``label``         (B,) int64    classifiers: the class of each sequence, in place of ``targets``
``cu_seqlens``    (N+1,) int32  optional: bounds of the N documents packed into a single row, B = 1, from 0 to T;
                                nothing leaks across them
``padding_mask``  (B, T) bool   optional: True at real tokens; padding cannot matter, and may be left or right
``part``          two           optional, in evaluations: the name of the part of the set that this batch belongs to,
                                and the names of all; language models then report the accuracy of each,
                                ``accuracy/{name}``, and their mean, ``mean_accuracy``
``answer``        (B, T) int64  optional, with ``part``: which answer of its sequence a token belongs to; an answer then
                                counts as right if all of its tokens are
``names``         (B, T) int64  optional, in evaluations, of bytes: what each target is (:mod:`lit_modules.data.names`);
                                language models then report the bits per byte of names that come back apart
================  ============  ======================================================================================

Other keys, shapes, dtypes and ids are refused (:func:`lit_modules.data.batches.check_batch`). A batch of Hugging Face's
has other names and unshifted labels: see :func:`lit_modules.data.batches.from_hugging_face`.
"""

DATA = {
    "text": "lit_modules.data.text:TextData",
    "tokens": "lit_modules.data.tokens:TokenData",
    "mqar": "lit_modules.data.mqar:MQARData",
    "mqar_zoology": "lit_modules.data.zoology:ZoologyData",
    "mqar_zoology_small": "lit_modules.data.zoology:SmallZoologyData",
    "ruler": "lit_modules.data.ruler:RulerData",
    "rewrite": "lit_modules.data.rewrite:RewriteData",
    "facts": "lit_modules.data.facts:FactsData",
    "permutations": "lit_modules.data.permutations:PermutationsData",
    "two_pass": "lit_modules.data.two_pass:TwoPassData",
    "mad_recall": "lit_modules.data.mad.recall:RecallData",
    "mad_noisy_recall": "lit_modules.data.mad.recall:NoisyRecallData",
    "mad_fuzzy_recall": "lit_modules.data.mad.fuzzy_recall:FuzzyRecallData",
    "mad_selective_copying": "lit_modules.data.mad.selective_copying:SelectiveCopyingData",
    "mad_compression": "lit_modules.data.mad.compression:CompressionData",
    "mad_memorization": "lit_modules.data.mad.memorization:MemorizationData",
    "classification": "lit_modules.data.classification:ClassificationData",
}

MODELS = {
    "language_model": "lit_modules.language_model:LanguageModel",
    "compressor": "lit_modules.compressor:Compressor",
    "sequence_classifier": "lit_modules.sequence_classifier:SequenceClassifier",
}
